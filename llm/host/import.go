package host

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/hf"
	"github.com/atoll-run/atoll/sandbox"
)

// Import copies a GGUF file from a path or an HTTP address, or makes one of a folder in
// Hugging Face's layout, and checks that it is a model that can be served. progress, which may be nil, is told of bytes; all is -1
// when it is not known. name may be empty. It fails with Exists when the name is
// taken by another model; the same again is no error.
func (s *Store) Import(ctx context.Context, origin, name string, progress func(done, all int64)) (Info, error) {
	if name == "" {
		name = NameOf(origin)
	}
	if err := checkName(name); err != nil {
		return Info{}, err
	}
	part, err := s.part()
	if err != nil {
		return Info{}, err
	}
	defer os.RemoveAll(part)
	digest, err := fetch(ctx, origin, filepath.Join(part, weightsName), progress)
	if err != nil {
		return Info{}, err
	}
	info, err := describe(filepath.Join(part, weightsName))
	if err != nil {
		return Info{}, &sandbox.Err{Op: "host.Import", Kind: sandbox.KindOf(err), Subject: origin, Err: causeOf(err), Hint: sandbox.HintOf(err)}
	}
	info.Name, info.Digest, info.Origin = name, digest, origin
	return s.install(part, info)
}

// install makes a model of a folder that has its weights, unless it is there already.
func (s *Store) install(part string, info Info) (Info, error) {
	const op = "host.Import"
	name := info.Name
	if there, err := s.Has(name, info.Digest); err != nil || there {
		old, _ := s.Info(name)
		return old, err
	}
	info.Imported = time.Now().UTC().Truncate(time.Second)
	data, err := json.MarshalIndent(info, "", "  ")
	if err == nil {
		err = os.WriteFile(filepath.Join(part, infoName), data, 0o600)
	}
	if err == nil {
		_ = os.RemoveAll(filepath.Join(s.dir, name)) // without a description it is what a removal left
		err = os.Rename(part, filepath.Join(s.dir, name))
	}
	if err != nil {
		return Info{}, sandbox.E(op, sandbox.Internal, name, err)
	}
	return info, nil
}

// Has reports whether a model is there. It fails with Exists when another one has its name.
func (s *Store) Has(name, digest string) (bool, error) {
	old, err := s.Info(name)
	if err != nil || old.Digest == digest {
		return err == nil, nil
	}
	return false, sandbox.Errorf("host.Import", sandbox.Exists, name, "another model has this name").
		WithHint("choose another with --name, or remove it with `atoll model rm " + name + "`")
}

// Receive takes a model of another node: fill writes its weights to a path. Nothing that the other says is believed but its name and
// where the model is from: the weights are compared with the digest, and described anew.
func (s *Store) Receive(ctx context.Context, of Info, fill func(ctx context.Context, path string) error) error {
	const op = "host.Receive"
	if err := checkName(of.Name); err != nil {
		return err
	}
	part, err := s.part()
	if err != nil {
		return err
	}
	defer os.RemoveAll(part)
	weights := filepath.Join(part, weightsName)
	if err := fill(ctx, weights); err != nil {
		return err
	}
	digest, err := digestOf(ctx, weights)
	if err != nil {
		return err
	}
	if digest != of.Digest {
		return sandbox.Errorf(op, sandbox.Invalid, of.Name, "what came is %s", digest)
	}
	info, err := describe(weights)
	if err != nil {
		return err
	}
	info.Name, info.Digest, info.Origin = of.Name, digest, of.Origin
	_, err = s.install(part, info)
	return err
}

// part makes a folder in which a model is put together.
func (s *Store) part() (string, error) {
	const op = "host.Import"
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return "", sandbox.E(op, sandbox.Denied, s.dir, err)
	}
	part, err := os.MkdirTemp(s.dir, partPrefix)
	if err != nil {
		return "", sandbox.E(op, sandbox.Denied, s.dir, err)
	}
	return part, nil
}

// causeOf is err without the names of our own files in it.
func causeOf(err error) error {
	var e *sandbox.Err
	for errors.As(err, &e) && e.Err != nil {
		err = e.Err
	}
	return err
}

// fetch copies a file and returns its digest.
func fetch(ctx context.Context, origin, to string, progress func(done, all int64)) (digest string, err error) {
	const op = "host.fetch"
	if info, err := os.Stat(origin); err == nil && info.IsDir() {
		if err := convert(ctx, origin, to, progress); err != nil {
			return "", err
		}
		return digestOf(ctx, to)
	}
	if gguf.PartNames(origin) != nil {
		if err := joinParts(ctx, origin, to, progress); err != nil {
			return "", err
		}
		return digestOf(ctx, to)
	}
	var from io.Reader
	var all int64
	if IsURL(origin) {
		body, size, err := get(ctx, origin)
		if err != nil {
			return "", err
		}
		defer body.Close()
		from, all = body, size
	} else {
		f, err := os.Open(filepath.Clean(origin))
		if err != nil {
			return "", sandbox.E(op, sandbox.NotFound, origin, err)
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil || !info.Mode().IsRegular() {
			return "", sandbox.Errorf(op, sandbox.Invalid, origin, "not a regular file").WithHint("give a GGUF file")
		}
		from, all = f, info.Size()
	}
	out, err := os.OpenFile(filepath.Clean(to), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", sandbox.E(op, sandbox.Denied, to, err)
	}
	sum := blake3.New()
	n, err := io.Copy(io.MultiWriter(out, sum), &watched{ctx: ctx, r: from, all: all, progress: progress})
	if err = errors.Join(err, out.Sync(), out.Close()); err != nil {
		return "", sandbox.E(op, "", origin, err)
	}
	if all >= 0 && n != all {
		return "", sandbox.Errorf(op, sandbox.Unavailable, origin, "%d of %d bytes came", n, all)
	}
	return "blake3:" + hex.EncodeToString(sum.Sum(nil)), nil
}

// convert makes a GGUF file of a folder.
func convert(ctx context.Context, dir, to string, progress func(done, all int64)) error {
	m, err := hf.Open(dir)
	if err != nil {
		return err
	}
	err = m.Save(to, func(done, all int64) error {
		if progress != nil {
			progress(done, all)
		}
		return ctx.Err()
	})
	return errors.Join(err, m.Close())
}

// joinParts makes one file of a model in parts.
func joinParts(ctx context.Context, origin, to string, progress func(done, all int64)) (err error) {
	var front *gguf.File
	var data io.ReaderAt
	if IsURL(origin) {
		f, r, err := openURL(ctx, origin)
		if err != nil {
			return err
		}
		defer r.Close()
		front, data = f, r
	} else {
		r, err := gguf.Open(origin)
		if err != nil {
			return err
		}
		defer r.Close()
		front, data = r.File, r
	}
	whole, err := gguf.New(front.Meta, front.Tensors)
	if err != nil {
		return sandbox.E("host.joinParts", sandbox.Invalid, origin, err)
	}
	w := &watched{ctx: ctx, all: whole.End(), progress: progress}
	return whole.Save(to, func(out io.Writer, t *gguf.Tensor) error {
		from := front.Tensor(t.Name)
		w.r = io.NewSectionReader(data, from.Offset, from.Size)
		_, err := io.Copy(out, w)
		return err
	})
}

func digestOf(ctx context.Context, name string) (string, error) {
	const op = "host.digestOf"
	f, err := os.Open(filepath.Clean(name))
	if err != nil {
		return "", sandbox.E(op, sandbox.Internal, name, err)
	}
	defer f.Close()
	sum := blake3.New()
	if _, err := io.Copy(sum, &watched{ctx: ctx, r: f}); err != nil {
		return "", sandbox.E(op, "", name, err)
	}
	return "blake3:" + hex.EncodeToString(sum.Sum(nil)), nil
}

// IsURL reports whether a model is named by an HTTP address.
func IsURL(s string) bool {
	return strings.HasPrefix(s, "http://") || strings.HasPrefix(s, "https://")
}

// get reads a file behind an address from its beginning to its end, over connections that break where its server serves parts.
func get(ctx context.Context, url string) (io.ReadCloser, int64, error) {
	const op = "host.get"
	r, err := openRanges(ctx, url)
	if err == nil {
		return &struct {
			io.Reader
			io.Closer
		}{io.NewSectionReader(r, 0, r.size), &remote{parts: []*ranges{r}}}, r.size, nil
	}
	if !sandbox.Is(err, sandbox.Unsupported) {
		return nil, 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, 0, sandbox.E(op, sandbox.Invalid, url, err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, 0, sandbox.E(op, sandbox.Unavailable, url, err)
	}
	if res.StatusCode != http.StatusOK {
		_ = res.Body.Close()
		return nil, 0, sandbox.Errorf(op, sandbox.NotFound, url, "the server answered %s", res.Status)
	}
	return res.Body, res.ContentLength, nil
}

// watched is a reader that ends with its context and tells how far it is.
type watched struct {
	ctx       context.Context
	r         io.Reader
	done, all int64
	progress  func(done, all int64)
}

func (w *watched) Read(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := w.r.Read(p)
	w.done += int64(n)
	if w.progress != nil {
		w.progress(w.done, w.all)
	}
	return n, err
}
