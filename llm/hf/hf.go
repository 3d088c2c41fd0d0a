// Package hf turns a folder in Hugging Face's layout into a GGUF file.
//
// GGUF is the one form in which the engine knows models, so whatever can be
// imported is brought into it once: the shape of the model and its tokenizer become
// metadata, tensors get GGUF's names and order of rows, and weights that somebody has
// quantised (GPTQ, AWQ, compressed-tensors, FP8) become blocks that hold the same
// numbers, or floats where no block does.
package hf

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/safetensors"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
)

// maxConfig bounds the small JSON files of a folder, in bytes.
const maxConfig = 16 << 20

// A Model is an open folder.
type Model struct {
	folder *safetensors.Folder
	config modelConfig
	file   *gguf.File
	plans  map[string]plan // what each tensor of file is made of
}

// Open reads all of a folder but the weights, and plans the file that it becomes.
// Errors are NotFound, Invalid, and Unsupported for what the engine does not know.
func Open(dir string) (*Model, error) {
	const op = "hf.Open"
	m := &Model{}
	if err := readJSON(dir, "config.json", &m.config); err != nil {
		return nil, sandbox.E(op, kindOf(err), dir, err)
	}
	if err := m.config.settle(); err != nil {
		return nil, sandbox.E(op, kindOf(err), dir, err)
	}
	var meta gguf.Meta
	if err := m.config.store(&meta, filepath.Base(filepath.Clean(dir))); err != nil {
		return nil, sandbox.E(op, kindOf(err), dir, err)
	}
	if err := storeTokenizer(&meta, dir); err != nil {
		return nil, sandbox.E(op, "", dir, err)
	}
	folder, err := safetensors.OpenFolder(dir)
	if err != nil {
		return nil, sandbox.E(op, "", dir, err)
	}
	m.folder = folder
	tensors, err := m.plan()
	if err == nil {
		m.file, err = gguf.New(meta, tensors)
	}
	if err != nil {
		_ = folder.Close()
		return nil, sandbox.E(op, kindOf(err), dir, err)
	}
	return m, nil
}

// File returns what the GGUF file will say; shared.
func (m *Model) File() *gguf.File { return m.file }

// Save writes the GGUF file, whole or not at all. progress is told after each tensor
// how many bytes are written, of how many; it may be nil, and stops the writing with
// an error.
func (m *Model) Save(name string, progress func(done, all int64) error) error {
	return m.file.Save(name, func(w io.Writer, t *gguf.Tensor) error {
		if err := m.write(w, t); err != nil {
			return err
		}
		if progress == nil {
			return nil
		}
		return progress(t.Offset+t.Size, m.file.End())
	})
}

// Close closes the folder.
func (m *Model) Close() error { return m.folder.Close() }

// readJSON reads a small file of a folder.
func readJSON(dir, name string, to any) error {
	file, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer file.Close()
	raw, err := io.ReadAll(io.LimitReader(file, maxConfig))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, to); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func kindOf(err error) sandbox.Kind {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return sandbox.NotFound
	case errors.Is(err, errors.ErrUnsupported):
		return sandbox.Unsupported
	}
	var e *sandbox.Err
	if errors.As(err, &e) {
		return e.Kind
	}
	return sandbox.Invalid
}

// storeTokenizer puts the vocabulary and the chat template of a folder into metadata.
func storeTokenizer(m *gguf.Meta, dir string) error {
	read := tokenizer.ReadJSON
	vocabulary, err := os.Open(filepath.Join(dir, "tokenizer.json"))
	if errors.Is(err, fs.ErrNotExist) {
		read = tokenizer.ReadSentencePiece
		vocabulary, err = os.Open(filepath.Join(dir, "tokenizer.model"))
	}
	if err != nil {
		return sandbox.E("hf.Open", kindOf(err), dir, err).WithHint("a model needs a tokenizer.json or SentencePiece's tokenizer.model")
	}
	defer vocabulary.Close()
	var conf io.Reader
	file, err := os.Open(filepath.Join(dir, "tokenizer_config.json"))
	if err == nil {
		defer file.Close()
		conf = file
	}
	spec, err := read(vocabulary, conf)
	if err != nil {
		return err
	}
	if err := spec.Store(m); err != nil {
		return err
	}
	template, err := chatTemplate(dir)
	if err != nil || template == "" {
		return err
	}
	return m.Set("tokenizer.chat_template", template)
}

// chatTemplate returns the template of a folder: from a file of its own, or from
// tokenizer_config.json, where it may be one of several. Empty if there is none.
func chatTemplate(dir string) (string, error) {
	file, err := os.Open(filepath.Join(dir, "chat_template.jinja"))
	if err == nil {
		defer file.Close()
		b, err := io.ReadAll(io.LimitReader(file, maxConfig))
		return string(b), err
	}
	var c struct {
		Template json.RawMessage `json:"chat_template"`
	}
	if err := readJSON(dir, "tokenizer_config.json", &c); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", nil
		}
		return "", err
	}
	var text string
	if json.Unmarshal(c.Template, &text) == nil {
		return text, nil
	}
	var several []struct{ Name, Template string }
	if json.Unmarshal(c.Template, &several) == nil {
		for _, t := range several {
			if t.Name == "default" {
				return t.Template, nil
			}
		}
	}
	return "", nil
}
