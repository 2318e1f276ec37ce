"""Training on a selection: small models made on the spot and a plain, resumable PyTorch loop."""
