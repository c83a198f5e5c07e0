"""The last stage's sampling, on logits that are cut by vocabulary; no rank ever sees all of them."""
