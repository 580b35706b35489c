"""Files that callers upload, and outputs of batches: content in a folder, what is known of them in the state store."""
