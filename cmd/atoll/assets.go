package main

import (
	"embed"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// assets holds the programs that run beside ours, once `make build` has put
// them there.
//
//go:embed all:assets
var assets embed.FS

// The embedded programs.
const (
	guestName  = "atoll-guest"  // the agent inside every sandbox
	sentryName = "atoll-sentry" // the kernel of a gVisor sandbox
)

// bundled returns the path of an embedded program: written below home the first
// time that this build of it is used, or else the one beside our own executable.
func bundled(home, name string) (string, error) {
	const op = "atoll.bundled"
	f, err := assets.Open("assets/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return besideUs(op, name)
	}
	if err != nil {
		return "", sandbox.E(op, sandbox.Internal, name, err)
	}
	defer f.Close()
	path, size, err := programPath(home, name, f)
	if err != nil {
		return "", sandbox.E(op, sandbox.Internal, name, err)
	}
	if info, err := os.Stat(path); err == nil && info.Size() == size {
		return path, nil
	}
	if err := writeProgram(path, name); err != nil {
		return "", sandbox.E(op, sandbox.Denied, path, err).WithHint("set ATOLL_HOME to a directory that you can write")
	}
	return path, nil
}

// buildIDSize is how far into a program Go's build ID lies at most. It names
// the program's content, so that not all of it has to be read to tell one build
// from another.
const buildIDSize = 4 << 10

// programPath is where a program belongs, and its size in bytes.
func programPath(home, name string, f fs.File) (string, int64, error) {
	head := make([]byte, buildIDSize)
	if _, err := io.ReadFull(f, head); err != nil {
		return "", 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	sum := blake3.Sum256(head)
	return filepath.Join(home, "bin", hex.EncodeToString(sum[:8]), name), info.Size(), nil
}

// writeProgram puts an embedded executable at path in one step, so that another command
// never starts half of one.
func writeProgram(path, name string) error {
	content, err := assets.ReadFile("assets/" + name)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Chmod(0o755), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

func besideUs(op, name string) (string, error) {
	self, err := os.Executable()
	if err == nil {
		path := filepath.Join(filepath.Dir(self), name)
		if _, err = os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", sandbox.Errorf(op, sandbox.NotFound, name, "this build of atoll has no %s in it", name).WithHint("build it with `make build`")
}
