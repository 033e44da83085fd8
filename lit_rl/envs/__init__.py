"""Worlds that answer back: desktops, browsers, phones, games, behind one asynchronous protocol."""
