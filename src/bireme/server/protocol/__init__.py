"""What clients send and are sent, in OpenAI's words and vLLM's extensions of them."""
