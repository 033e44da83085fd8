"""The body of the batch route: what goes in comes out, and nothing else is accepted."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from lit_rl.rewards.service.wire import WireError, decode_answer, decode_batch, encode_batch

RNG = np.random.default_rng(0)


def picture(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def body_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("sizes", [[(4, 6)], [(4, 6), (4, 6)], [(4, 6), (2, 3), (1, 1)]])
def test_round_trip(sizes: list[tuple[int, int]]) -> None:
    images = [picture(*size) for size in sizes]
    masks = [np.full(size, 255, np.uint8) for size in sizes]
    prompts = [f'a sign "été {i}"' for i in range(len(sizes))]
    targets = ["été", *[None] * (len(sizes) - 1)]
    batch = decode_batch(encode_batch(images, prompts, request_id="r-1", masks=masks, targets=targets))
    assert (batch.prompts, batch.targets, batch.request_id) == (prompts, targets, "r-1")
    assert batch.masks is not None
    for sent, got in zip([*images, *masks], [*batch.images, *batch.masks], strict=True):
        np.testing.assert_array_equal(sent, got)


def test_it_is_the_public_safetensors_format() -> None:
    media = np.stack([picture(4, 6)] * 3)
    np.testing.assert_array_equal(load(encode_batch(media, ["a", "b", "c"], request_id="x"))["images"], media)


def test_strided_media_is_sent_in_its_visible_order() -> None:
    media = np.ascontiguousarray(np.stack([picture(4, 6)] * 2).transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert not media.flags.c_contiguous
    np.testing.assert_array_equal(decode_batch(encode_batch(media, ["a", "b"], request_id="")).images, media)


def test_decoding_does_not_copy() -> None:
    body = encode_batch(picture(8, 8)[None], ["a"], request_id="")
    assert np.shares_memory(decode_batch(body).images[0], np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("media", "prompts", "text"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), ["a"], "2 images came with 1 prompts"),
        (np.zeros((1, 4, 4, 3), np.float32), ["a"], "float32"),
        (np.zeros((0, 4, 4, 3), np.uint8), [], "at least one image"),
        (np.zeros((1, 4, 4, 3), np.uint8), ["\ud800"], "valid Unicode"),
        (np.zeros((1, 4, 4, 3), np.uint8), ["x" * 70_000], "at most 65536 characters"),
        (np.zeros((1, 3, 4, 4), np.uint8), ["a"], r"expected uint8 \[H, W, 3\]"),
    ],
)
def test_encoding_refuses_what_the_server_would(media: np.ndarray, prompts: list[str], text: str) -> None:
    with pytest.raises(WireError, match=text):
        encode_batch(media, prompts, request_id="")


META = {"prompts": '["a"]', "request_id": "x"}
ONE = {"dtype": "U8", "shape": [1, 1, 1, 3], "data_offsets": [0, 3]}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "at least 8 bytes"),
        (b"\xff" * 64, "header claims"),
        (b"\x80\x04K\x01." * 9, "header claims"),  # a pickle
        (body_of(b"[" * 100_000), "not JSON"),
        (body_of([]), "not a JSON object"),
        (body_of({"images": ONE}, b"abc"), "`prompts` is missing"),
        (body_of({"__metadata__": {"prompts": ["a"]}, "images": ONE}, b"abc"), "strings to strings"),
        (body_of({"__metadata__": {"prompts": "[]"}, "images": ONE}, b"abc"), "at least 1"),
        (body_of({"__metadata__": {"prompts": "[1]"}, "images": ONE}, b"abc"), "list of strings"),
        (body_of({"__metadata__": META, "images": {**ONE, "shape": [1, 60000, 60000, 3]}}, b"abc"), "does not fit"),
        (body_of({"__metadata__": META, "images": {**ONE, "shape": [1, -1, -1, 3]}}, b"abc"), "whole numbers"),
        (body_of({"__metadata__": META, "images": {**ONE, "data_offsets": [0, 9]}}, b"abc"), "does not fit"),
        (body_of({"__metadata__": META, "images": {**ONE, "dtype": "F32"}}, b"abc"), "dtype U8"),
        (body_of({"__metadata__": META, "images": ONE}, b"abcd"), "1 bytes follow"),
        (body_of({"__metadata__": META, "images": ONE, "more": {**ONE, "data_offsets": [1, 4]}}, b"abcd"), "does not fit"),
        (body_of({"__metadata__": META, "images": {**ONE, "shape": [3, 1, 1, 1]}}, b"abc"), "expected \\[1, H, W, 3\\]"),
        (body_of({"__metadata__": META, "images": {**ONE, "shape": [1, 0, 1, 3], "data_offsets": [0, 0]}}), "empty axes"),
        (body_of({"__metadata__": META, "image_001": {**ONE, "shape": [1, 1, 3]}}, b"abc"), "`image_000` is missing"),
        (body_of(b'{"__metadata__": {"prompts": "[\\"a\\"]"}, "images": 1, "images": 2}'), "twice"),
    ],
)
def test_decoding_refuses(body: bytes, text: str) -> None:
    with pytest.raises(WireError, match=text):
        decode_batch(body)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_bodies_never_raise_anything_else(data: st.DataObject) -> None:
    body = bytearray(encode_batch([picture(2, 3), picture(3, 2)], ["a", 'b "c"'], request_id="id"))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    try:
        batch = decode_batch(bytes(body[:cut]))
    except WireError:
        return
    assert len(batch.images) == len(batch.prompts)


def test_answer_null_number_is_nan_and_null_row_has_a_reason() -> None:
    body = json.dumps({"scores": [{"a": 1, "b": None, "ocr_text": "x"}, None], "errors": {"1": {"code": "too_large", "message": "no"}}})
    rows, errors = decode_answer(body, 2)
    assert rows[0] is not None and rows[0]["a"] == 1.0 and np.isnan(rows[0]["b"]) and set(rows[0]) == {"a", "b"}
    assert rows[1] is None and errors == {1: "too_large: no"}


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b"[]", b'{"scores": [{"a": "1"}, 2], "errors": {}}', b'{"scores": [true], "errors": {}}']
)
def test_answer_that_is_none(body: bytes) -> None:
    with pytest.raises(WireError):
        decode_answer(body, 1)
