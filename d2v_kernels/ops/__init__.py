"""One file a family of operators: public function, shape functions, definition in plain PyTorch, gradient, schema."""
