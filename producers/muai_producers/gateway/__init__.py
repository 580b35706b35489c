"""The HTTP gateway. `muai_producers.gateway.app.create_gateway` makes it; the extra `gateway` brings what it needs."""
