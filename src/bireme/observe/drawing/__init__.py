"""What draws ledgers, steps and memory in a browser: ES modules that take plain JSON, whose shape each tells
at its top, a style sheet, and uPlot. The live page serves them; a report can hold them.

Every `import` and `export` stands on a line of its own, and top-level names are unique among the modules.
"""
