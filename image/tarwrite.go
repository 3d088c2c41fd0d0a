package image

import (
	"archive/tar"
	"io"
	"strings"
	"time"
)

// writeTar writes a tree as a plain tar archive that depends on nothing but the
// tree. Paths in skip are left out; what is below them is not.
func writeTar(w io.Writer, t *tree, skip map[string]bool) error {
	tw := tar.NewWriter(w)
	first := map[*inode]string{}
	err := t.walk(func(name string, n *inode) error {
		if skip[name] {
			return nil
		}
		name = strings.TrimPrefix(name, "/")
		if n.isDir() {
			name += "/"
		}
		if name == "/" {
			name = "./"
		}
		if other, ok := first[n]; ok {
			return tw.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: other, Format: tar.FormatPAX})
		}
		if !n.isDir() {
			first[n] = name
		}
		if err := tw.WriteHeader(n.header(name)); err != nil {
			return err
		}
		if n.data == nil {
			return nil
		}
		_, err := io.Copy(tw, io.NewSectionReader(n.data, 0, n.data.Size()))
		return err
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

func (n *inode) header(name string) *tar.Header {
	h := &tar.Header{
		Name:    name,
		Mode:    int64(n.mode &^ typeMask),
		Uid:     int(n.uid),
		Gid:     int(n.gid),
		ModTime: time.Unix(n.mtime, int64(n.nsec)),
		Format:  tar.FormatPAX,
	}
	switch n.mode & typeMask {
	case typeDir:
		h.Typeflag = tar.TypeDir
	case typeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.target
	case typeFifo:
		h.Typeflag = tar.TypeFifo
	default:
		h.Typeflag, h.Size = tar.TypeReg, n.size()
	}
	if len(n.xattrs) > 0 {
		h.PAXRecords = map[string]string{}
	}
	for key, value := range n.xattrs {
		h.PAXRecords[paxXattr+key] = value // the writer sorts them
	}
	return h
}
