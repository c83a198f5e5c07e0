"""HTTP in OpenAI's words, in front of an engine that runs in a process of its own."""
