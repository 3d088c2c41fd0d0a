// Package host keeps language models on disk and those in use in memory.
package host

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
)

// Info is what is known of a model on disk.
type Info struct {
	Name       string    `json:"name"`
	Digest     string    `json:"digest"` // BLAKE3 of the file
	Family     string    `json:"family"`
	Type       string    `json:"type"` // how most weights are kept
	Parameters int64     `json:"parameters"`
	Bytes      int64     `json:"bytes"` // of the file
	Context    int       `json:"context"`
	Origin     string    `json:"origin"`
	Imported   time.Time `json:"imported"`
}

// Store is the models in a directory, each in a folder of its own. Several processes
// may use it.
type Store struct{ dir string }

// OpenStore uses a directory, which need not be there yet.
func OpenStore(dir string) *Store { return &Store{dir} }

const (
	weightsName = "model.gguf"
	infoName    = "model.json" // written last: a folder without it is no model
	partPrefix  = ".import-"
)

var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,99}$`)

func checkName(name string) error {
	if !validName.MatchString(name) {
		return sandbox.Errorf("host.name", sandbox.Invalid, name, "this cannot be a model's name").
			WithHint("use letters, digits, dots, dashes and underscores")
	}
	return nil
}

// NameOf is what a model is called when nobody says: after its file.
func NameOf(origin string) string {
	base := filepath.Base(strings.TrimRight(origin, "/"))
	if i := strings.IndexAny(base, "?#"); i >= 0 {
		base = base[:i]
	}
	base = regexp.MustCompile(`-\d{5}-of-\d{5}$`).ReplaceAllString(strings.TrimSuffix(base, ".gguf"), "")
	clean := strings.ToLower(regexp.MustCompile(`[^a-zA-Z0-9._-]+`).ReplaceAllString(base, "-"))
	return strings.TrimLeft(clean, "-._")
}

// List returns the models, by name. What is damaged is left out.
func (s *Store) List() ([]Info, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, sandbox.E("host.List", sandbox.Denied, s.dir, err)
	}
	var list []Info
	for _, e := range entries {
		if info, err := s.Info(e.Name()); err == nil {
			list = append(list, info)
		}
	}
	return list, nil
}

// Info returns what is known of one model. It fails with NotFound.
func (s *Store) Info(name string) (Info, error) {
	const op = "host.Info"
	var info Info
	if err := checkName(name); err != nil {
		return info, err
	}
	data, err := os.ReadFile(filepath.Join(s.dir, name, infoName))
	if err != nil {
		return info, sandbox.Errorf(op, sandbox.NotFound, name, "there is no model of this name").WithHint(s.hint())
	}
	if err := json.Unmarshal(data, &info); err != nil || info.Name != name {
		return info, sandbox.Errorf(op, sandbox.Internal, name, "its description is damaged").WithHint("import it again")
	}
	return info, nil
}

// hint says what can be done about a missing model.
func (s *Store) hint() string {
	list, err := s.List()
	if err != nil || len(list) == 0 {
		return "import one with `atoll model import FILE.gguf`"
	}
	names := make([]string, 0, 5)
	for _, info := range list[:min(len(list), 5)] {
		names = append(names, info.Name)
	}
	return "there are " + strings.Join(names, ", ")
}

// Weights is the file of a model.
func (s *Store) Weights(name string) string { return filepath.Join(s.dir, name, weightsName) }

// Scratch is a directory beside the models, for one that is being made.
func (s *Store) Scratch() (string, error) {
	dir := filepath.Join(s.dir, ".quantize")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", sandbox.E("host.Scratch", sandbox.Denied, dir, err)
	}
	return dir, nil
}

// Remove deletes a model. One that is in use stays in the memory of its users.
func (s *Store) Remove(name string) error {
	if _, err := s.Info(name); err != nil {
		return err
	}
	// First the description, so that what is left of an interrupted removal is no model.
	dir := filepath.Join(s.dir, name)
	if err := errors.Join(os.Remove(filepath.Join(dir, infoName)), os.RemoveAll(dir)); err != nil {
		return sandbox.E("host.Remove", sandbox.Denied, name, err)
	}
	return nil
}

// describe reads the front of a model and checks that it could be loaded.
func describe(name string) (Info, error) {
	r, err := gguf.Open(name)
	if err != nil {
		return Info{}, err
	}
	defer r.Close()
	src, err := model.FromGGUFData(r.File, r)
	if err != nil {
		return Info{}, err
	}
	if _, err := model.Weights(src, model.Shard{}); err != nil {
		return Info{}, err
	}
	c := src.Config()
	tokens, err := tokenizer.FromGGUF(&r.Meta)
	if err == nil {
		err = tokens.Fits(c.Vocab)
	}
	if err != nil {
		return Info{}, sandbox.E("host.describe", sandbox.Invalid, name, err)
	}
	info := Info{Family: c.Family, Context: c.Context}
	byType := map[string]int64{}
	for i := range r.Tensors {
		t := &r.Tensors[i]
		info.Parameters += t.Elements()
		byType[t.Type.String()] += t.Elements()
	}
	for name, n := range byType {
		if n > byType[info.Type] || (n == byType[info.Type] && name < info.Type) {
			info.Type = name
		}
	}
	stat, err := os.Stat(name)
	if err != nil {
		return Info{}, sandbox.E("host.describe", sandbox.Internal, name, err)
	}
	info.Bytes = stat.Size()
	return info, nil
}
