"""What a web app touches: wire types, errors, queue names, the client, the gateway, the command line."""
