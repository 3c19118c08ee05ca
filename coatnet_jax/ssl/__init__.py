"""Self-supervised methods: how two views of each face teach an encoder."""
