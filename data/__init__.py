"""The bundled corpora, installed as `surrogate._data`: one folder each, with a card and a recipe.

This file is here for the editable install, which finds `surrogate._data` only where it is a regular package.
"""
