package gvisor

import (
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/zeebo/blake3"
)

// digests are those of the runtime's images, by name. An image never changes once it has its name.
type digests struct {
	mu    sync.Mutex
	known map[string]string // at most maxHeld
}

// maxHeld bounds how many images are told of: one of each version of the guest agent and of the host's files that was used.
const maxHeld = 64

// Holds returns the images that this host has, by digest: a snapshot that comes from another node of the same version need not
// bring the guest agent.
func (r *Runtime) Holds() map[string]string {
	out := make(map[string]string)
	paths, err := filepath.Glob(filepath.Join(r.images(), "*"+imageSuffix))
	if err != nil {
		return out
	}
	for _, path := range paths[:min(len(paths), maxHeld)] {
		if d, err := r.digests.of(path); err == nil { // what cannot be read is sent
			out[d] = path
		}
	}
	return out
}

// of returns an image's digest, which is computed once.
func (d *digests) of(path string) (string, error) {
	name := filepath.Base(path)
	d.mu.Lock()
	defer d.mu.Unlock()
	if known, ok := d.known[name]; ok {
		return known, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	h := blake3.New()
	_, err = io.Copy(h, f)
	if err := errors.Join(err, f.Close()); err != nil {
		return "", err
	}
	digest := "blake3:" + hex.EncodeToString(h.Sum(nil))
	if d.known == nil || len(d.known) >= maxHeld {
		d.known = make(map[string]string)
	}
	d.known[name] = digest
	return digest, nil
}
