package server

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	filesystempb "github.com/atoll-run/atoll/guest/gen/filesystem"
	"github.com/atoll-run/atoll/guest/wire"
)

// describer makes EntryInfos; it reads the names of users once.
type describer struct{ users, groups map[uint32]string }

func newDescriber() describer {
	users, groups := loadAccounts().names()
	return describer{users, groups}
}

// describe reads an entry without following a symlink.
func (d describer) describe(path string) (*filesystempb.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return d.entry(path, info), nil
}

// entry describes what Lstat said of path. E2B reports type and mode of a
// symlink's target and its resolved path; a symlink that leads nowhere is
// reported as a symlink with the text of the link.
func (d describer) entry(path string, info os.FileInfo) *filesystempb.EntryInfo {
	mode := info.Mode()
	e := &filesystempb.EntryInfo{
		Name:         wire.EncodeName(filepath.Base(path)),
		Path:         wire.EncodeName(path),
		Size:         info.Size(),
		Permissions:  mode.String(),
		ModifiedTime: timestamppb.New(info.ModTime()),
		Metadata:     readMetadata(path),
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = nameOr(d.users, st.Uid), nameOr(d.groups, st.Gid)
	}
	if mode&os.ModeSymlink != 0 {
		target, err := filepath.EvalSymlinks(path)
		if err == nil {
			info, err = os.Stat(target)
		}
		if err == nil {
			mode = info.Mode()
		} else {
			target, _ = os.Readlink(path)
		}
		target = wire.EncodeName(target)
		e.SymlinkTarget = &target
	}
	e.Mode = uint32(mode.Perm())
	switch {
	case mode.IsRegular():
		e.Type = filesystempb.FileType_FILE_TYPE_FILE
	case mode.IsDir():
		e.Type = filesystempb.FileType_FILE_TYPE_DIRECTORY
	case mode&os.ModeSymlink != 0:
		e.Type = filesystempb.FileType_FILE_TYPE_SYMLINK
	}
	return e
}

func nameOr(names map[uint32]string, id uint32) string {
	if name, ok := names[id]; ok {
		return wire.EncodeName(name)
	}
	return strconv.FormatUint(uint64(id), 10)
}

// readMetadata reads the metadata of a file. What cannot be read is left out:
// an entry without metadata is better than none.
func readMetadata(path string) map[string]string {
	var list [4096]byte
	n, err := unix.Llistxattr(path, list[:])
	if err != nil || n == 0 {
		return nil
	}
	var meta map[string]string
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		key, ours := strings.CutPrefix(name, wire.MetadataXattr)
		if !ours || key == "" {
			continue
		}
		var value [wire.MaxMetadataBytes]byte
		if n, err := unix.Lgetxattr(path, name, value[:]); err == nil {
			if meta == nil {
				meta = map[string]string{}
			}
			meta[wire.EncodeName(key)] = strings.ToValidUTF8(string(value[:n]), "\ufffd")
		}
	}
	return meta
}

// writeMetadata makes meta the whole metadata of a file.
func writeMetadata(path string, meta map[string]string) error {
	for key := range readMetadata(path) {
		if _, keep := meta[key]; !keep {
			if err := unix.Lremovexattr(path, wire.MetadataXattr+key); err != nil {
				return &os.PathError{Op: "remove metadata", Path: path, Err: err}
			}
		}
	}
	for key, value := range meta {
		if err := unix.Lsetxattr(path, wire.MetadataXattr+key, []byte(value), 0); err != nil {
			return &os.PathError{Op: "set metadata", Path: path, Err: err}
		}
	}
	return nil
}

// makeDirs makes a directory and its missing parents, all of them owned by the
// account.
func makeDirs(path string, acct account) error {
	var missing []string
	for p := path; ; p = filepath.Dir(p) {
		info, err := os.Stat(p)
		if err == nil && info.IsDir() {
			break
		}
		if err == nil {
			return &os.PathError{Op: "mkdir", Path: p, Err: syscall.ENOTDIR}
		}
		if !os.IsNotExist(err) {
			return err
		}
		missing = append(missing, p)
		if p == filepath.Dir(p) {
			break
		}
	}
	for i := len(missing) - 1; i >= 0; i-- {
		err := os.Mkdir(missing[i], 0o755)
		if os.IsExist(err) {
			continue // somebody else was faster
		}
		if err != nil {
			return err
		}
		if err := acct.own(missing[i]); err != nil {
			return err
		}
	}
	return nil
}

func isNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
