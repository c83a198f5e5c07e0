"""The live page at `/`: HTML, a style sheet and ES modules, as they are; what it draws with is `observe.drawing`."""
