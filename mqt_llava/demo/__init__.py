"""The demo: a page that shows the effect of the number of visual tokens, and what an answer depends on.

`answers` runs the model, `app` is the page, `markup` generates HTML that Gradio has no component for, and `space` writes the demo as
a Space for the Hub.
"""
