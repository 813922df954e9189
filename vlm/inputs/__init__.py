"""The two halves of the input contract: pixels in, tokens in."""
