"""The demo: a page that shows what the number of visual tokens does, and what an answer looks at.

`answers` is the model's side, `app` the page, `markup` what the page shows that Gradio has no component for, and `space` the
same page as a Space on the Hub.
"""
