"""Measurements in rooms by subject, with the drawn scenes and the models that they are made with.

`quality` has the ruler, `speed` whole pipelines, `model` scenes and training, `gpu` all that needs
a GPU; `results` has what they wrote.
"""
