"""A server for many clients, with OpenAI's HTTP interface; needs the extra "server".

`app` puts the routes together; `service` holds the engine that they share.
"""
