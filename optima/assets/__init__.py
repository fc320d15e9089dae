"""What is shipped: weights that a command takes where none are named, and the program `export` puts beside ONNX."""

from pathlib import Path

TEACHER = Path(__file__).with_name("teacher.safetensors")
STUDENT = Path(__file__).with_name("student.safetensors")
USE_ONNX = Path(__file__).with_name("use_onnx.txt")
