package server

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
)

const (
	copyBuffer = 256 << 10 // bytes: the unit of streaming files
	headBuffer = 64 << 10  // bytes: smaller files are sent from memory
)

// file finds the path and the user of a /files call and checks that the caller
// may do op. It answers the call itself when not.
func (s *Server) file(w http.ResponseWriter, r *http.Request, op string) (path string, acct account, ok bool) {
	q := r.URL.Query()
	token := r.Header.Get(wire.HeaderToken)
	switch {
	case s.settings.allows(token):
	case token != "":
		writeError(w, http.StatusUnauthorized, "access token present in header but does not match")
		return "", acct, false
	default:
		sig := wire.Signature{Value: q.Get("signature"), Expires: q.Get("signature_expiration")}
		if reason := s.settings.verify(sig, q.Get("path"), op, q.Get("username")); reason != "" {
			writeError(w, http.StatusUnauthorized, reason)
			return "", acct, false
		}
	}
	acct, err := s.settings.account(requestUser(r))
	if err != nil {
		writeError(w, http.StatusUnauthorized, err.Error())
		return "", acct, false
	}
	path, err = s.settings.resolve(q.Get("path"), acct)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return "", acct, false
	}
	return path, acct, true
}

// verify checks a signature against the token in force.
func (s *settings) verify(sig wire.Signature, path, op, user string) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return sig.Verify(s.token, path, op, user, time.Now().Unix())
}

// download answers GET /files.
func (s *Server) download(w http.ResponseWriter, r *http.Request) {
	path, _, ok := s.file(w, r, wire.OpRead)
	if !ok {
		return
	}
	// Non-blocking: opening a FIFO must not wait for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		writeError(w, statusOf(err), err.Error())
		return
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		writeError(w, statusOf(err), err.Error())
		return
	case info.IsDir():
		writeError(w, http.StatusBadRequest, fmt.Sprintf("path '%s' is a directory", path))
		return
	case !info.Mode().IsRegular():
		writeError(w, http.StatusBadRequest, fmt.Sprintf("path '%s' is not a regular file", path))
		return
	}
	h := w.Header()
	h.Set("Vary", "Accept-Encoding")
	if name := mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}); name != "" {
		h.Set("Content-Disposition", name)
	}
	if h.Set("Content-Type", mime.TypeByExtension(filepath.Ext(path))); h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/octet-stream")
	}
	sendFile(w, r, f, info)
}

// sendFile sends the content of a file. What fits into a buffer is read first:
// files of /proc and /sys misstate their sizes.
func sendFile(w http.ResponseWriter, r *http.Request, f *os.File, info os.FileInfo) {
	head := make([]byte, headBuffer)
	n, err := io.ReadFull(f, head)
	whole := err == io.EOF || err == io.ErrUnexpectedEOF
	if err != nil && !whole {
		writeError(w, statusOf(err), err.Error())
		return
	}
	name, all := filepath.Base(f.Name()), io.MultiReader(bytes.NewReader(head[:n]), f)
	switch {
	case wantsGzip(r):
		w.Header().Set("Content-Encoding", "gzip")
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
		if _, err := io.Copy(z, all); err != nil {
			panic(http.ErrAbortHandler) // so that the client sees a cut stream
		}
		_ = z.Close()
	case whole:
		http.ServeContent(w, r, name, info.ModTime(), bytes.NewReader(head[:n]))
	case info.Size() == 0:
		if _, err := io.Copy(w, all); err != nil {
			panic(http.ErrAbortHandler)
		}
	default:
		http.ServeContent(w, r, name, info.ModTime(), f)
	}
}

// wantsGzip reports whether the caller asked for compression. HTTP libraries
// add "gzip, deflate" by themselves; compressing every file for them would cost
// more than it saves, so only "gzip" alone counts.
func wantsGzip(r *http.Request) bool {
	for _, h := range []string{"Range", "If-Range", "If-Modified-Since", "If-None-Match"} {
		if r.Header.Get(h) != "" {
			return false
		}
	}
	return strings.EqualFold(strings.TrimSpace(r.Header.Get("Accept-Encoding")), "gzip")
}

// body returns the request's body, decompressed.
func body(r *http.Request) (io.Reader, error) {
	switch enc := strings.ToLower(r.Header.Get("Content-Encoding")); enc {
	case "", "identity":
		return r.Body, nil
	case "gzip":
		return gzip.NewReader(r.Body)
	default:
		return nil, fmt.Errorf("unsupported content encoding: %s", enc)
	}
}

// upload answers POST /files.
func (s *Server) upload(w http.ResponseWriter, r *http.Request) {
	path, acct, ok := s.file(w, r, wire.OpWrite)
	if !ok {
		return
	}
	meta, err := metadataOf(r.Header)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	in, err := body(r)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	hasPath := r.URL.Query().Has("path")
	u := uploader{s: s, acct: acct, meta: meta, done: []wire.FileInfo{}}
	media, params, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	switch {
	case media == "application/octet-stream" && !hasPath:
		err = errors.New("the query parameter path is required for a raw upload")
	case media == "application/octet-stream":
		err = u.store(path, in)
	case strings.HasPrefix(media, "multipart/") && params["boundary"] != "":
		if !hasPath {
			path = ""
		}
		err = u.multipart(multipart.NewReader(in, params["boundary"]), path)
	default:
		err = fmt.Errorf("unsupported content type %q: use multipart/form-data or application/octet-stream", media)
	}
	if err != nil {
		code := http.StatusBadRequest
		var pathErr *os.PathError
		if isNoSpace(err) || (errors.As(err, &pathErr) && !errors.Is(err, syscall.EISDIR) && !errors.Is(err, syscall.ENOTDIR)) {
			code = statusOf(err)
		}
		writeError(w, code, err.Error())
		return
	}
	writeJSON(w, u.done)
}

// metadataOf reads the X-Metadata-* headers. Keys are lower case, since HTTP
// does not keep the case of header names.
func metadataOf(h http.Header) (map[string]string, error) {
	meta := map[string]string{}
	for name, values := range h {
		key, ok := strings.CutPrefix(name, wire.HeaderMetadata)
		if !ok || key == "" {
			continue
		}
		if len(values[0]) > wire.MaxMetadataBytes {
			return nil, fmt.Errorf("metadata %s is longer than %d bytes", key, wire.MaxMetadataBytes)
		}
		meta[strings.ToLower(key)] = values[0]
	}
	return meta, nil
}

// uploader stores the files of one request.
type uploader struct {
	s    *Server
	acct account
	meta map[string]string
	done []wire.FileInfo
}

// maxUploads bounds the files of one multipart request.
const maxUploads = 100_000

// multipart stores every part named "file". Each goes to path or, when path is
// empty, to its own file name, which may hold directories.
func (u *uploader) multipart(parts *multipart.Reader, path string) error {
	seen := map[string]bool{}
	for {
		part, err := parts.NextPart()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("multipart: %w", err)
		}
		if part.FormName() != "file" {
			continue
		}
		to := path
		if to == "" {
			name, err := partName(part.Header.Get("Content-Disposition"))
			if err != nil {
				return err
			}
			if to, err = u.s.settings.resolve(name, u.acct); err != nil {
				return err
			}
		}
		if seen[to] {
			return fmt.Errorf("several files for the same path '%s' in one upload, only the first was stored", to)
		}
		if len(seen) == maxUploads {
			return fmt.Errorf("more than %d files in one upload", maxUploads)
		}
		seen[to] = true
		if err := u.store(to, part); err != nil {
			return err
		}
	}
}

// partName reads the file name of a part whole; the standard library's
// FileName cuts the directories off.
func partName(disposition string) (string, error) {
	_, params, err := mime.ParseMediaType(disposition)
	if err != nil || params["filename"] == "" {
		return "", errors.New("multipart: a file without a file name")
	}
	return params["filename"], nil
}

// store writes one file. As E2B does, it writes into an existing file rather
// than replacing it, so that watchers see a write and links stay intact.
func (u *uploader) store(path string, content io.Reader) error {
	if err := makeDirs(filepath.Dir(path), u.acct); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NONBLOCK, 0o666)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := u.acct.ownFile(f); err != nil {
		return err
	}
	// A plain buffer: ReadFrom would try splice first, which some kernels lack.
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, content, make([]byte, copyBuffer)); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := writeMetadata(path, u.meta); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	info := wire.FileInfo{Path: wire.EncodeName(path), Name: wire.EncodeName(filepath.Base(path)), Type: "file"}
	if len(u.meta) > 0 {
		info.Metadata = u.meta
	}
	u.done = append(u.done, info)
	return nil
}
