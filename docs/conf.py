"""Sphinx renders what `build.py` has staged: prose, code, and stored outputs as they are."""

from pygments.formatters import HtmlFormatter
from pygments.token import Name, Punctuation, Whitespace
from sphinx.highlighting import PygmentsBridge

project = "vla_bench"
copyright = "The vla_bench authors"
extensions = ["myst_nb", "sphinx_copybutton"]
mathjax_path = "mathjax/tex-svg.js"  # of sphinx-mathjax-offline; build.py puts it there: pages ask nobody else for anything
html_copy_source = False
html_show_sourcelink = False
html_theme = "furo"
html_title = "vla_bench"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_use_index = False
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "imports and set-up"
nb_code_prompt_hide = "imports and set-up"
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]


class Lean(HtmlFormatter):
    """Writes no tag around names, commas and spaces, which have the colour of the text: half the size of a page."""

    def _get_css_classes(self, ttype):
        return "" if ttype in (Name, Punctuation, Whitespace) else super()._get_css_classes(ttype)


PygmentsBridge.html_formatter = Lean


def own_branch(app, pagename, templatename, context, doctree):
    """The sidebar shows the sections, and within the reader's own; all pages in each would be a third of the size."""
    from furo.navigation import get_navigation_tree

    depth = 2 if pagename.startswith("reference/") else -1  # a package there has dozens of modules
    tree = context["toctree"](collapse=True, titles_only=True, maxdepth=depth, includehidden=True)
    context["furo_navigation_tree"] = get_navigation_tree(tree)


def setup(app):
    app.connect("html-page-context", own_branch, priority=900)  # after the theme
    return {"parallel_read_safe": True}
