"""Traces are read as they are, and refused with the line and the remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from statistics import fmean

import pytest

from quire.errors import ConfigError
from quire.workload import TraceRequest, prompt_token_ids, read_trace

SHARED = Path(__file__).parents[2].parent / "shared" / "traces"


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_csv(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, '\ufefft_s, prompt,output,model\r\n0.0000,374,44,a\r\n\r\n4,"396",109,b\r\n')
    assert read_trace(path) == [TraceRequest(0.0, 374, 44), TraceRequest(4.0, 396, 109)]
    assert read_trace(str(write(tmp_path, name, "output,prompt\n5,74"))) == [TraceRequest(None, 74, 5)]


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
@pytest.mark.parametrize("keys", ["tioh", ("timestamp", "input_length", "output_length", "hash_ids")])
def test_mooncake(tmp_path: Path, name: str, keys: str | tuple[str, ...]) -> None:
    rows = [(0, 512, 500, [0]), (2500, 513, 1, [0, 14])]
    path = write(tmp_path, name, "".join(json.dumps(dict(zip(keys, row, strict=True)) | {"other": 1}) + "\n" for row in rows))
    assert read_trace(path) == [TraceRequest(0.0, 512, 500, (0,)), TraceRequest(2.5, 513, 1, (0, 14))]
    path = write(tmp_path, name, json.dumps({keys[1]: 5, keys[2]: 6}))
    assert read_trace(path) == [TraceRequest(None, 5, 6, None)]


GOOD = '{"t": 0, "i": 600, "o": 5, "h": [1, 2]}\n'
HEADER = "t_s,prompt,output\n0,1,2\n"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "", "holds no requests: give a file with at least one"),
        ("a.csv", "prompt,output\n\n", "holds no requests"),
        ("a.csv.gz", "", "holds no requests"),
        ("a.csv", "t_s,prompt\n1,2\n", "line 1: the header has 0 columns named output: .* it names t_s, prompt"),
        ("a.csv", "\nTIMESTAMP,ContextTokens\n", "line 2: the header has 0 columns named prompt"),
        ("a.csv", "prompt,output,prompt\n", "line 1: the header has 2 columns named prompt"),
        ("a.csv", HEADER + "1,2\n", "line 3: the row has 2 values, but the header has 3 columns"),
        ("a.csv", HEADER + "\n1,2,3,4\n", "line 4: the row has 4 values, but the header has 3 columns"),
        ("a.csv", HEADER + "1,many,3\n", "line 3: prompt must be a number of tokens from 1 to 100,000,000, got 'many'"),
        ("a.csv", HEADER + "1,2,-3\n", "line 3: output must be a number of tokens .* got -3: correct or remove the line"),
        ("a.csv", HEADER + "1,2,0\n", "line 3: output .* got 0"),
        ("a.csv", HEADER + "1,2.5,3\n", "line 3: prompt .* got 2.5"),
        ("a.csv", HEADER + "1,,3\n", "line 3: prompt .* got ''"),
        ("a.csv", HEADER + f"1,{'9' * 5000},3\n", "line 3: prompt .* got inf"),
        ("a.csv", HEADER + "nan,1,3\n", "line 3: t_s must be seconds from 0 to 1e[+]15, got nan"),
        ("a.csv", HEADER + "-1,1,3\n", "line 3: t_s .* got -1"),
        ("a.csv", HEADER + "noon,1,3\n", "line 3: t_s .* got 'noon'"),
        ("a.csv", HEADER + '1,"2,3\n', "line 3: this is not CSV"),
        ("a.csv", HEADER.encode() + b"1,\xff,3\n", "line 3: this is not UTF-8 text"),
        ("a.jsonl", "", "holds no requests"),
        ("a.jsonl", GOOD + "{", "line 2: this is not a JSON object: write one object a line"),
        ("a.jsonl", GOOD + "[1]", "line 2: this is not a JSON object"),
        ("a.jsonl", GOOD + "[" * 100_000, "line 2: this is not a JSON object"),
        ("a.jsonl", '{"prompt": 5}', "line 1: there is no key input_length: every line must have input_length and output_length"),
        ("a.jsonl", '{"i": 5}', "line 1: there is no key o: every line must have i and o"),
        ("a.jsonl", GOOD + '{"i": 5, "o": 5, "h": [1]}', "line 2: there is no key t: every line must have t and i and o and h"),
        ("a.jsonl", '{"i": 5, "o": 5}\n' + GOOD, "line 2: the key t is in this line, but not in the first"),
        ("a.jsonl", GOOD.replace("600", '"600"'), "line 1: i must be a number of tokens from 1 to 100,000,000, got '600'"),
        ("a.jsonl", GOOD.replace("600", "true"), "line 1: i .* got True"),
        ("a.jsonl", GOOD.replace("600", "1e999"), "line 1: i .* got inf"),
        ("a.jsonl", GOOD.replace("600", "-600"), "line 1: i .* got -600"),
        ("a.jsonl", GOOD.replace("600", "9" * 5000), "line 1: "),
        ("a.jsonl", GOOD.replace('"t": 0', '"t": NaN'), "line 1: t must be milliseconds from 0 .* got nan"),
        ("a.jsonl", GOOD.replace('"t": 0', '"t": null'), "line 1: t .* got None"),
        ("a.jsonl", GOOD.replace("[1, 2]", "[1]"), "line 1: h has 1 ids, but a prompt of 600 tokens has 2 blocks of 512"),
        ("a.jsonl", GOOD.replace("[1, 2]", "[1, -2]"), r"line 1: h must be a list of numbers from 0, got \[1, -2\]"),
        ("a.jsonl", GOOD.replace("[1, 2]", "7"), "line 1: h must be a list of numbers from 0, got 7"),
        ("a.txt", GOOD, r"a.txt is of an unknown kind: its name must end in .csv, .jsonl, .csv.gz or .jsonl.gz"),
        ("csv", HEADER, "unknown kind"),
        ("a.gz", HEADER, "unknown kind"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, text: str | bytes, says: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_trace(path)
    assert caught.value.message.startswith(f"the trace {path}")
    assert len(caught.value.message) < len(str(path)) + 400


def test_compressed_files_that_are_damaged(tmp_path: Path) -> None:
    whole = gzip.compress((HEADER + "".join(f"{i},{i * i},7\n" for i in range(1, 3000))).encode())
    path = tmp_path / "a.csv.gz"
    for data in (whole[: len(whole) // 2], whole[:-4], whole[:1000] + bytes(50) + whole[1050:], b"t_s,prompt,output\n1,2,3\n", b"\x1f"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"line [\d,]+: the compressed data is damaged or cut short .*: get the file again"):
            read_trace(path)
    with pytest.raises(ConfigError, match="line 1: the compressed"):
        read_trace(path)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read the trace .*none\.csv: No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match=r"can't read the trace .*folder\.csv: Is a directory"):
        read_trace(tmp_path / "folder.csv")


@pytest.mark.parametrize(
    ("name", "rows", "prompt", "output", "last"),
    [
        ("azure_conv_2023.csv.gz", 19_366, 1155, 211, 3500),
        ("sharegpt_8k_llama2_lengths.csv.gz", 30_731, 2340, 439, None),
        ("mooncake_conversation.jsonl.gz", 12_031, 12_035, 343, 3536),
    ],
)
def test_the_real_ones(name: str, rows: int, prompt: int, output: int, last: int | None) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    requests = read_trace(path)
    assert len(requests) == rows
    assert round(fmean(r.prompt_tokens for r in requests)) == prompt
    assert round(fmean(r.output_tokens for r in requests)) == output
    if last is None:
        assert all(r.arrival_s is None for r in requests)
    else:
        assert requests[-1].arrival_s == pytest.approx(last, rel=0.02)
    tokens = [prompt_token_ids(r, i, 32_000) for i, r in enumerate(requests[:20])]
    assert [len(t) for t in tokens] == [r.prompt_tokens for r in requests[:20]]
    if requests[0].prefix_ids is not None:
        assert tokens[0][:512] == tokens[1][:512], "the system prompt"
        assert tokens[0][512:528] != tokens[1][512:528]
