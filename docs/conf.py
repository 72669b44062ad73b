"""Sphinx renders the notebooks as they are: their prose, their code, their stored outputs."""

project = "vla_bench"
copyright = "The vla_bench authors"
extensions = ["myst_nb", "sphinx_copybutton"]
mathjax_path = "mathjax/tex-svg.js"  # of sphinx-mathjax-offline; build.py puts it there: pages ask nobody else for anything
html_copy_source = False
html_theme = "furo"
html_title = "vla_bench"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "imports"
nb_code_prompt_hide = "imports"
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]
