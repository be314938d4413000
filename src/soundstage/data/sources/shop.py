"""Product pictures and films of a shop that tells its products as JSON, as Shopify's do."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from soundstage.core.errors import ConfigError, RequestError
from soundstage.data.flow import Item
from soundstage.data.sources.address import canonical
from soundstage.data.web import Manners, Refused, Web, open_web

__all__ = ["Shop"]

PAGES = 10_000


@dataclass(frozen=True)
class Shop:
    """Images and videos of the products of a shop with their facts, page after page of /products.json.

    url: the shop, or one of its collections (https://shop/collections/lamps). licence: what the shop's owner allowed;
    without it, items are of unknown licence. images, videos: what is wanted; for videos each product's own record
    (/products/HANDLE.js) is asked too, where the list does not tell them. parts: as in Fetch, to share what is known of
    hosts. Items carry "product": id, handle, title, vendor, type, tags, text, price, and "shot": the place among its
    images and videos. A video on another site is given as that site's page, for yt-dlp.
    """

    url: str
    licence: str | None = None
    images: bool = True
    videos: bool = True
    page_size: int = 250
    parts: str | None = None
    manners: Manners = field(default=Manners(), compare=False)

    def __iter__(self) -> Iterator[Item]:
        base = re.sub(r"/products\.json.*", "", canonical(self.url).partition("?")[0]).rstrip("/")
        with open_web(Path(self.parts) / "hosts" if self.parts else None, self.manners) as web:
            for product in self._products(web, base):
                yield from self._items(web, base, product)

    def _products(self, web: Web, base: str) -> Iterator[Mapping[str, Any]]:
        """Every product once, though a shop may repeat its last page for ever."""
        seen: set[Any] = set()
        for page in range(1, PAGES):
            address = f"{base}/products.json?limit={self.page_size}&page={page}"
            try:
                told = web.json(address)
            except Refused as error:
                raise RequestError(f"shop: {error}") from None
            products = told.get("products") if isinstance(told, dict) else None
            if not isinstance(products, list):
                raise ConfigError(f"shop: {address} tells no products; is it a shop of this kind?")
            new = [each for each in products if isinstance(each, dict) and each.get("id") not in seen]
            if not new:
                return
            seen.update(each.get("id") for each in new)
            yield from new

    def _items(self, web: Web, base: str, product: Mapping[str, Any]) -> Iterator[Item]:
        shop = "{0.scheme}://{0.netloc}".format(urlsplit(base))
        page = f"{shop}/products/{product.get('handle')}"
        facts = {
            "source": "shop",
            "title": product.get("title"),
            "author": product.get("vendor"),
            "page": page,
            "product": _product(product),
            "licence": self.licence,
        }
        facts = {key: value for key, value in facts.items() if value not in (None, "")}
        if self.images:
            for place, image in enumerate(product.get("images") or [], 1):
                alt = {"caption": " ".join(image["alt"].split())} if image.get("alt") else {}
                yield _item(shop, image["src"], facts | alt | {"shot": {"kind": "image", "place": place}})
        if self.videos:
            media = product.get("media")
            if media is None and product.get("handle"):
                media = self._media(web, page)
            films = [each for each in media or [] if each.get("media_type") in ("video", "external_video")]
            for place, film in enumerate(films, 1):
                yield from _film(shop, film, facts | {"shot": {"kind": "video", "place": place}})

    def _media(self, web: Web, page: str) -> list[Mapping[str, Any]]:
        """The media of one product; none where its record may not be had."""
        try:
            told = web.json(f"{page}.js")
        except Refused:
            return []
        return (told.get("media") or []) if isinstance(told, dict) else []


def _product(product: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a product; text without its markup."""
    tags = product.get("tags") or []
    variants = product.get("variants") or [{}]
    told = {
        "id": product.get("id"),
        "handle": product.get("handle"),
        "title": product.get("title"),
        "vendor": product.get("vendor"),
        "type": product.get("product_type") or product.get("type"),
        "tags": [tag.strip() for tag in tags.split(",")] if isinstance(tags, str) else list(tags),
        "text": " ".join(html.unescape(re.sub(r"<[^>]*>", " ", product.get("body_html") or "")).split()),
        "price": variants[0].get("price"),
    }
    return {key: value for key, value in told.items() if value not in (None, "", [])}


def _film(shop: str, film: Mapping[str, Any], facts: dict[str, Any]) -> Iterator[Item]:
    """The largest file of a video, or its page on another site."""
    if film["media_type"] == "external_video":
        pages = {"youtube": "https://www.youtube.com/watch?v={}", "vimeo": "https://vimeo.com/{}"}
        page = pages.get(str(film.get("host", "")).lower())
        if page and film.get("external_id"):
            yield Item({}, facts | {"source": "ytdlp", "url": canonical(page.format(film["external_id"]))})
        return
    files = [each for each in film.get("sources") or [] if each.get("url") and each.get("format") != "m3u8"]
    if files:
        best = max(files, key=lambda each: (each.get("height") or 0, each.get("format") == "mp4"))
        yield _item(shop, best["url"], facts)


def _item(shop: str, url: str, facts: dict[str, Any]) -> Item:
    return Item({}, facts | {"url": canonical(urljoin(f"{shop}/", url))})
