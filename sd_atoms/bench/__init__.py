"""What training, decomposing and convolving cost, measured on architectures with random weights."""
