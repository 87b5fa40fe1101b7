"""The algebra: Hadamard matrices, fast transforms, invertible maps that fold into weights or run online."""
