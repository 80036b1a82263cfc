"""One file an operation: its real shapes, the bytes and operations it must do, and its peers."""
