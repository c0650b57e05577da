"""What to run a model on and what to measure: data, classification, text to text, language modelling."""
