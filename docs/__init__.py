"""The documentation: pages, and what builds and checks them."""
