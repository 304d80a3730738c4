"""What an output consists of: content, reasoning and calls of tools, told apart in text that comes in pieces."""
