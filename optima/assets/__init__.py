"""The models that are shipped: weights that a command takes where none are named."""

from pathlib import Path

TEACHER = Path(__file__).with_name("teacher.safetensors")
STUDENT = Path(__file__).with_name("student.safetensors")
