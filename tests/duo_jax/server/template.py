"""A chat template for the demo model, which has none: it shows tools, and can be continued."""

TEMPLATE = (
    "{{ bos_token }}{% if tools %}Tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'nobody' %}{{ raise_exception('nobody cannot speak') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
