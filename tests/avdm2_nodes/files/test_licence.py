import os

import pytest

from avdm2_nodes.files.licence import licence_of

APACHE = """
                                 Apache License
                           Version 2.0, January 2004
                        http://www.apache.org/licenses/
"""


@pytest.mark.parametrize(
    "text, said",
    [
        (b"Apache-2.0\n\nThe text is elsewhere.\n", "Apache-2.0"),
        (APACHE.encode(), "Apache-2.0"),
        (b"\xef\xbb\xbf\n\n  MIT License\n\nCopyright", "MIT License"),
        (b"", "CreativeML OpenRAIL-M"),
        (b" \n\n\t\n", "CreativeML OpenRAIL-M"),
        ("Lizenz für Modelle".encode("cp1252"), "Lizenz f\N{REPLACEMENT CHARACTER}r Modelle"),
        (b"\xff\xfe" + "MIT".encode("utf-16-le"), "\N{REPLACEMENT CHARACTER}" * 2 + r"M\x00I\x00T\x00"),
    ],
    ids=["one line", "apache", "mit", "empty", "blank", "cp1252", "utf-16"],
)
def test_what_a_licence_says(tmp_path, text, said):
    (tmp_path / "LICENSE").write_bytes(text)
    assert licence_of(tmp_path) == said


def test_none_is_sd15s(tmp_path):
    assert licence_of(tmp_path) == licence_of(tmp_path / "a.safetensors") == "CreativeML OpenRAIL-M"
    os.mkfifo(tmp_path / "LICENSE")
    assert licence_of(tmp_path) == "CreativeML OpenRAIL-M"
