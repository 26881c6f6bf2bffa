"""Operations on quantized arrays: one public function each, with a ``backend=`` argument."""
