package main

import (
	"embed"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// assets holds the guest agent once `make build` has put it there.
//
//go:embed all:assets
var assets embed.FS

const guestName = "atoll-guest"

// guestPath returns the path of the guest agent for runtimes to copy into
// sandboxes: the embedded one, written below home the first time that this
// build of it is used, or else the one beside our own executable.
func guestPath(home string) (string, error) {
	const op = "atoll.guest"
	program, err := assets.ReadFile("assets/" + guestName)
	if errors.Is(err, fs.ErrNotExist) {
		return besideUs(op)
	}
	if err != nil {
		return "", sandbox.E(op, sandbox.Internal, guestName, err)
	}
	sum := blake3.Sum256(program)
	path := filepath.Join(home, "bin", hex.EncodeToString(sum[:8]), guestName)
	if info, err := os.Stat(path); err == nil && info.Size() == int64(len(program)) {
		return path, nil
	}
	if err := writeProgram(path, program); err != nil {
		return "", sandbox.E(op, sandbox.Denied, path, err).WithHint("set ATOLL_HOME to a directory that you can write")
	}
	return path, nil
}

// writeProgram puts an executable at path in one step, so that another command
// never starts half of one.
func writeProgram(path string, program []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(program)
	if err = errors.Join(err, f.Chmod(0o755), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

func besideUs(op string) (string, error) {
	self, err := os.Executable()
	if err == nil {
		path := filepath.Join(filepath.Dir(self), guestName)
		if _, err = os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", sandbox.Errorf(op, sandbox.NotFound, guestName, "this build of atoll has no guest agent in it").WithHint("build it with `make build`")
}
