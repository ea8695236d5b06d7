"""The Llama family as functional Linen modules: parameters in, activations out."""
