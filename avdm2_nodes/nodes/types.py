"""The kinds of wire that are ours."""

from comfy_api.latest import io

TeacherWire = io.Custom("AVDM2_TEACHER")
StudentWire = io.Custom("AVDM2_STUDENT")

CATEGORY = "AVDM2"
