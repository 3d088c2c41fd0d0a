package gvisor

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// agentImage is the guest agent as a file system: one file, "guest".
type agentImage struct {
	path   string
	digest string // of the agent, "blake3:hex"
}

// makeAgentImage builds the image of the agent at guest in dir, unless it is
// there already. Images of other agents stay: running sandboxes use them.
func makeAgentImage(dir, guest string) (agentImage, error) {
	const op = "gvisor.New"
	src, err := os.Open(guest)
	if err != nil {
		return agentImage{}, sandbox.E(op, sandbox.Invalid, guest, err).WithHint("Config.Guest must be the path of the guest agent")
	}
	defer src.Close()
	hash := blake3.New()
	if _, err := io.Copy(hash, src); err != nil {
		return agentImage{}, err
	}
	digest := hex.EncodeToString(hash.Sum(nil))
	img := agentImage{path: filepath.Join(dir, digest[:32]+".erofs"), digest: "blake3:" + digest}
	err = makeImage(img.path, func(w *erofs.Writer) error {
		if _, err := src.Seek(0, io.SeekStart); err != nil {
			return err
		}
		return addFile(w, "/guest", src, 0o755)
	})
	return img, err
}

// makeImage builds an EROFS image at path with add, or leaves the one that is
// there. It appears whole or not at all.
func makeImage(path string, add func(*erofs.Writer) error) error {
	if _, err := os.Stat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	w := erofs.Create(tmp, erofs.WithBlockSize(4096), erofs.WithBuildTime(0, 0), erofs.WithTempDir(dir))
	if err := w.Mkdir("/", fs.ModeDir|0o755); err != nil {
		return err
	}
	if err := add(w); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// addFile writes one file of an image.
func addFile(w *erofs.Writer, name string, r io.Reader, mode fs.FileMode) error {
	f, err := w.Create(name)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, r); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return w.Chtimes(name, time.Unix(0, 0), time.Unix(0, 0))
}
