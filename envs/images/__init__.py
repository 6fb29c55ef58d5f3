"""Image classes for few-shot learning: glyphs that are drawn here, scikit-learn's digits, folders of images."""
