"""One function each: a torch reference, and a Triton version where one is faster."""
