package image

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// VerifyRoot fails with Invalid unless the file of a root is there and is what its
// name says. It reads all of it once after each boot of the host, and when the
// file's size or time has changed; otherwise it only looks at these.
func (s *Store) VerifyRoot(root sandbox.Root) error {
	const op = "image.VerifyRoot"
	if root.Kind != sandbox.RootEROFS && root.Kind != sandbox.RootDisk {
		return nil
	}
	file := rootFile(root)
	if s.looksSound(file) {
		return nil
	}
	s.verifying.Lock() // one reads, and the others profit
	defer s.verifying.Unlock()
	if s.looksSound(file) {
		return nil
	}
	got, err := hashFile(s.path("roots", file))
	if err == nil && got != root.Digest {
		err = fmt.Errorf("its content is not what it was")
	}
	if err != nil {
		return sandbox.Errorf(op, sandbox.Invalid, "", "the root %s of the image is damaged: %w", file, err).
			WithHint("pull, import or build the image again")
	}
	s.noteSound(file)
	return nil
}

// looksSound reports whether the file of a root looks as it did when it was last found, or
// made, as it should be.
func (s *Store) looksSound(file string) bool {
	seen, err := s.appearance(file)
	if err != nil {
		return false
	}
	noted, err := os.ReadFile(s.path("sound", file))
	return err == nil && string(noted) == seen
}

// noteSound remembers how the file of a root looks now. Without the note, which a full disk
// prevents, the root is read again next time.
func (s *Store) noteSound(file string) {
	seen, err := s.appearance(file)
	if err == nil {
		err = os.WriteFile(s.path("sound", file), []byte(seen), 0o600)
	}
	if err != nil {
		s.log.Warn("a root is read again before its next use", "root", file, "error", err)
	}
}

// appearance is what changes when a root's file does, and at each boot: a disk may
// have lost what was in memory only.
func (s *Store) appearance(file string) (string, error) {
	info, err := os.Stat(s.path("roots", file))
	if err != nil {
		return "", err
	}
	var inode uint64
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		inode = st.Ino
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d %d %d %s\n", info.Size(), info.ModTime().UnixNano(), inode, strings.TrimSpace(string(boot))), nil
}

// hashFile returns the digest of a root's file.
func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	hash := blake3.New()
	if _, err := io.CopyBuffer(hash, struct{ io.Reader }{f}, make([]byte, 1<<20)); err != nil {
		return "", err
	}
	return fmt.Sprintf("blake3:%x", hash.Sum(nil)), nil
}
