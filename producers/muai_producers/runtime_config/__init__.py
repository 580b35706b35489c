"""Settings that change while processes run: versions in the state store, and how a process follows them."""
