"""What a repository on the Hugging Face Hub needs beside a model and its processor."""
