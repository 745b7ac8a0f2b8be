"""A report, read back with a parser."""

import base64
import gzip
import json
from html.parser import HTMLParser

VOID = {"meta", "img", "link", "br", "hr", "input", "source"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps their attributes and the text outside of styles."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text, self.scripts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append((self.elements[-1][1], data))
        elif "style" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def script(self, name):
        """Content of the script element with this id."""
        return next(data for attrs, data in self.scripts if attrs.get("id") == name)

    @property
    def block(self):
        """What the page's script unpacks."""
        return json.loads(gzip.decompress(base64.b64decode(self.script("block"))))

    @property
    def case(self):
        (case,) = self.block["cases"]
        return case
