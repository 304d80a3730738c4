"""What the numbers say, in sentences, and what a reader has to know before believing them."""
