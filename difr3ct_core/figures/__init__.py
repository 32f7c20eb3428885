"""Saved results -> figures. No function here calls a model, so that anyone can redraw a figure from its files.

:mod:`~difr3ct_core.figures.style` holds what all figures share; the others hold the figures by subject.
"""
