"""The built pages, as a stranger sees them: no code cut off, equations without a network."""

import pytest

# Of every block of code: what is wider than the block, and whether the block scrolls by itself.
CUT = """
return [...document.querySelectorAll('article pre')].filter(block => {
    const scrolls = [block, ...block.querySelectorAll('*'), block.parentElement].some(
        e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX));
    return block.scrollWidth > block.clientWidth && !scrolls;
}).map(block => block.textContent.slice(0, 80));
"""
WIDE = """
return [...document.querySelectorAll('article pre')].filter(block => block.scrollWidth > block.clientWidth).map(
    block => block.textContent.slice(0, 80));
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_the_landing_page_cuts_no_code(width, pages, window):
    window.size(width, 900)
    window.driver.get(pages)
    window.wait("return document.querySelectorAll('article pre').length", "code on the landing page")
    window.keep(f"landing_{width}")
    assert not window.run(CUT)
    assert width < 1280 or not window.run(WIDE), "nothing needs to be scrolled on a screen"
    page = "return document.documentElement.scrollWidth <= innerWidth"
    assert window.run(page), "the page itself scrolls sideways"


def test_math_is_drawn_without_a_network(pages, window):
    window.driver.get(f"{pages}tutorials/10_own_head.html")
    drawn = "const found = [...document.querySelectorAll('article mjx-container svg')]; return found.length && found.every(e => e.getBoundingClientRect().width > 3)"
    window.wait(drawn, "equations")
    asked = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => n.startsWith('http') && !n.startsWith(location.origin))"
    assert window.run(asked) == []
    window.run("document.querySelector('article mjx-container[display]').scrollIntoView({block: 'center'})")
    window.keep("docs_math")
